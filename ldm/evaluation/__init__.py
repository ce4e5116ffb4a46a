"""One engine that measures images, for the callback and for ``ldm.evaluate``."""

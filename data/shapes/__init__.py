"""The embedded demo data: images of coloured shapes, with captions of their content and positions."""

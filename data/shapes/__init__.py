"""The embedded demo data: images of coloured shapes, with captions that say what is where."""

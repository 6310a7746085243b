"""What the notebooks compute: one module a notebook, tables out. The notebooks themselves are thin."""

"""The Jupyter kernel of flexmagic: IPython's own kernel with the extension loaded."""

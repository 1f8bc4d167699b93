"""The viewer of distributed tensors: view-model (numpy alone), static forms and the live widget.

``source`` is the seam: whatever implements :class:`flexmagic.view.source.Source` can be looked at.
``display.show`` is the entry point. Importing this package loads nothing heavy.
"""

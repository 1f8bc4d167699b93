"""What lives on a rank: the model, hooks, captures and the exchanges between ranks.

Nothing here knows ipyparallel or IPython, so it can be driven by anything that starts processes.
The verbs a client may send are the functions of :mod:`flexmagic.engine.verbs`.
"""

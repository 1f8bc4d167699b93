"""Where the parts of a distributed tensor lie: pure arithmetic, no processes.

Vocabulary: an *axis* belongs to the device mesh, a *dim* to a tensor, a *rank* is a process.
Nothing here talks to another process; everything is data in, data out.
"""

"""``pydecode bench``: every op against the machine's own roof and against every peer that is here.

Installed as ``pydecode.bench``. One file an op (its workloads), one file a peer (``peers/``).
"""

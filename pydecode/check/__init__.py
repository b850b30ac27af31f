"""``pydecode check``: every op of every backend against the fp64 reference, on this machine."""

"""The names and signatures of the packages that people come from, on the functions and layers of this one.

Every module stands for one package, ``difflayers.compat.torchdiffeq`` for torchdiffeq, so that the import is the only
line of a program that changes. Each says which version's signature it has, and what differs. Nothing here is loaded
unless it is imported by name.
"""

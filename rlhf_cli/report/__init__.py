"""`rlhf report`: any set of run directories as one HTML page that needs nothing beside itself.

find (directories) -> runs (dataclasses, whatever is damaged named) -> page (HTML); write does all of it.
"""

"""A run's needs of Lightning: its folder and files, checkpoints, signals, exact resume.

Nothing is imported here: some modules need no Lightning, whose import takes seconds.
"""

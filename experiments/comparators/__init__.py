"""Other systems of pruning on the networks and data of this project.

They are written here from descriptions of their methods, not from anybody's code; where those leave something
open, the choice is ours and is said where it is made.
"""

"""Other systems of pruning, written here from their papers, on the networks and data of this project."""

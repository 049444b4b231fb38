"""Parts of a network that can be taken out whole: found by running it, chosen, and removed."""

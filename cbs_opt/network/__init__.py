"""The user's network at the edge: data, partition, masks, write-back."""

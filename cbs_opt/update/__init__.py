"""Where the kept weights move."""

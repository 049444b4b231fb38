"""What is claimed: one command for each table, picture and page."""

"""What was chosen and why, as statistics that add up and as one page."""

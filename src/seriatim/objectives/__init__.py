"""What training minimises where it is not just the head's loss in one packed pass."""

"""Who should exist, who does, and what is done about the difference."""

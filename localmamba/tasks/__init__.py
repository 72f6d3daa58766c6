"""What is trained and how. The modules import Lightning; the package does not."""

"""What an image has for each range of the disk: data, zeros, or nothing."""

"""What several test modules share: references, observers and makers of files."""

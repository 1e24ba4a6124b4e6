"""What is measured: quality, speed, evaluation pages, the demo."""

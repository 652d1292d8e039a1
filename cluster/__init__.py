"""What the program needs of the machinery: configuration, errors, Ray start-up, tracking, reports."""

"""The Working Context: what it shows, how it is assembled, and who decides."""

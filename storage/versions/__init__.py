"""What is done with the versions of a context: branches, history, collection, removal, backups."""

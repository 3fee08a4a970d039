"""What turns a checkpoint into something others can use."""

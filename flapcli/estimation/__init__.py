"""What the stages would take, from headers alone and by what this machine does in a second."""

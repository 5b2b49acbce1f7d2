"""What chatfold made of each chat, for the terminal and for programs."""

"""The inspector's pages: what chatfold made of each chat, rendered on the server."""

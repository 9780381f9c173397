"""Reference policies, collection, the trajectory store and the training mixture."""

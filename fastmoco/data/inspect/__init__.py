"""What is in a data set, and with which settings to train on it: `fastmoco inspect`."""

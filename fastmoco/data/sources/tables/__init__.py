"""Images in a column of Parquet and Arrow files, as `datasets` and the hubs keep them."""

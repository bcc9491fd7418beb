"""Images in a column of Parquet and Arrow files: one file per `data.source`."""

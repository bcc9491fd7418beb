"""Shards and tables in object storage (`s3://`, `gs://`, `https://`), with a local cache."""

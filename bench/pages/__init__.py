"""Tables and pictures of the documents, made from rows."""

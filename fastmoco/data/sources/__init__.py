"""Where encoded images come from: one file per `data.source`."""

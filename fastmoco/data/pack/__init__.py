"""Any source of images, made smaller and laid into tar shards: `fastmoco pack`."""

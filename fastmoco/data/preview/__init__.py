"""Pictures of views: `fastmoco preview`, and the same of a step that was saved."""

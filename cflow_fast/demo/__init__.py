"""The demonstration, `cflow-fast demo`: materials and defects are made (`textures`), then inspected (`run`)."""

"""The stages of the pipeline: each module's `run(config, inputs, output_dir, progress)` works alone."""

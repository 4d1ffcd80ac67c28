"""The five stages, each: name the output by its content, reuse it when it is there, make it when it is not."""

"""One file a benchmark; the file's name is what ``gcpo evaluate --benchmark`` takes."""

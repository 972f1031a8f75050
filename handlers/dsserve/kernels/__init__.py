"""Operations of our own, C++ on a CPU and Triton on a GPU, and how they are compiled and captured."""

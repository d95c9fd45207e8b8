"""Operations with a kernel of ours: cpu.py calls the compiled ones, library.py gives them to torch."""

// What is chosen once for the process: the instruction set and who multiplies tiles. dispatch.cpp decides.
#pragma once
#include <string>
#include <vector>

namespace fastret {

struct Settings {
  std::string isa;        // base | avx2 | avx512
  bool use_blas = false;  // tiles through the process's BLAS instead of gemm.h's micro-kernel
};

Settings& settings();

std::vector<std::string> supported_isas();  // what this processor can run, best last
void set_isa(const std::string& name);      // "" : FASTRET_ISA from the environment, else the best
void set_gemm(const std::string& name);     // "" : FASTRET_GEMM from the environment, else by processor; own | blas

}  // namespace fastret

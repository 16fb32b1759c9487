// One source, compiled once per instruction set with -DFASTRET_ISA=base|avx2|avx512: everything such a file defines
// lives in namespace fastret::FASTRET_ISA, so that no two variants ever share a symbol. dispatch.cpp picks one.
#pragma once
#ifndef FASTRET_ISA
#error "compile with -DFASTRET_ISA=base, avx2 or avx512"
#endif
#define FASTRET_ISA_BEGIN \
  namespace fastret {     \
  namespace FASTRET_ISA { \
  namespace {
#define FASTRET_ISA_END \
  }                     \
  }                     \
  }

#if defined(__AVX512F__)
#define FASTRET_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTRET_VECTOR_BYTES 32
#else
#define FASTRET_VECTOR_BYTES 16
#endif

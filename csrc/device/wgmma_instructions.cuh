// The asm text of every wgmma instruction, for wgmma.cuh: one struct per operand type and N, with A from shared memory
// (a descriptor) or from registers.
//
// An asm statement numbers its operands, accumulators first, so the text depends on N. The tables below spell out the
// accumulators and, per N, the numbers that follow them.
#pragma once

#include "config.cuh"

namespace fastattn {

// The instruction D (64 x N, float) = A (64 x 16) B (16 x N) + D * accumulate, for T = half_t or bfloat16_t.
template <class T, int N, bool transpose_a, bool transpose_b>
struct Wgmma;

// D0, D1 ...: the accumulators in the instruction text; R: the same as operands.
#define FASTATTN_R(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define FASTATTN_D4 "%0, %1, %2, %3"
#define FASTATTN_D8 FASTATTN_D4 ", %4, %5, %6, %7"
#define FASTATTN_D12 FASTATTN_D8 ", %8, %9, %10, %11"
#define FASTATTN_D16 FASTATTN_D12 ", %12, %13, %14, %15"
#define FASTATTN_D20 FASTATTN_D16 ", %16, %17, %18, %19"
#define FASTATTN_D24 FASTATTN_D20 ", %20, %21, %22, %23"
#define FASTATTN_D28 FASTATTN_D24 ", %24, %25, %26, %27"
#define FASTATTN_D32 FASTATTN_D28 ", %28, %29, %30, %31"
#define FASTATTN_D36 FASTATTN_D32 ", %32, %33, %34, %35"
#define FASTATTN_D40 FASTATTN_D36 ", %36, %37, %38, %39"
#define FASTATTN_D44 FASTATTN_D40 ", %40, %41, %42, %43"
#define FASTATTN_D48 FASTATTN_D44 ", %44, %45, %46, %47"
#define FASTATTN_D52 FASTATTN_D48 ", %48, %49, %50, %51"
#define FASTATTN_D56 FASTATTN_D52 ", %52, %53, %54, %55"
#define FASTATTN_D60 FASTATTN_D56 ", %56, %57, %58, %59"
#define FASTATTN_D64 FASTATTN_D60 ", %60, %61, %62, %63"
#define FASTATTN_D68 FASTATTN_D64 ", %64, %65, %66, %67"
#define FASTATTN_D72 FASTATTN_D68 ", %68, %69, %70, %71"
#define FASTATTN_D76 FASTATTN_D72 ", %72, %73, %74, %75"
#define FASTATTN_D80 FASTATTN_D76 ", %76, %77, %78, %79"
#define FASTATTN_D84 FASTATTN_D80 ", %80, %81, %82, %83"
#define FASTATTN_D88 FASTATTN_D84 ", %84, %85, %86, %87"
#define FASTATTN_D92 FASTATTN_D88 ", %88, %89, %90, %91"
#define FASTATTN_D96 FASTATTN_D92 ", %92, %93, %94, %95"
#define FASTATTN_D100 FASTATTN_D96 ", %96, %97, %98, %99"
#define FASTATTN_D104 FASTATTN_D100 ", %100, %101, %102, %103"
#define FASTATTN_D108 FASTATTN_D104 ", %104, %105, %106, %107"
#define FASTATTN_D112 FASTATTN_D108 ", %108, %109, %110, %111"
#define FASTATTN_D116 FASTATTN_D112 ", %112, %113, %114, %115"
#define FASTATTN_D120 FASTATTN_D116 ", %116, %117, %118, %119"
#define FASTATTN_D124 FASTATTN_D120 ", %120, %121, %122, %123"
#define FASTATTN_D128 FASTATTN_D124 ", %124, %125, %126, %127"

#define FASTATTN_R4 FASTATTN_R(0)
#define FASTATTN_R8 FASTATTN_R4, FASTATTN_R(4)
#define FASTATTN_R12 FASTATTN_R8, FASTATTN_R(8)
#define FASTATTN_R16 FASTATTN_R12, FASTATTN_R(12)
#define FASTATTN_R20 FASTATTN_R16, FASTATTN_R(16)
#define FASTATTN_R24 FASTATTN_R20, FASTATTN_R(20)
#define FASTATTN_R28 FASTATTN_R24, FASTATTN_R(24)
#define FASTATTN_R32 FASTATTN_R28, FASTATTN_R(28)
#define FASTATTN_R36 FASTATTN_R32, FASTATTN_R(32)
#define FASTATTN_R40 FASTATTN_R36, FASTATTN_R(36)
#define FASTATTN_R44 FASTATTN_R40, FASTATTN_R(40)
#define FASTATTN_R48 FASTATTN_R44, FASTATTN_R(44)
#define FASTATTN_R52 FASTATTN_R48, FASTATTN_R(48)
#define FASTATTN_R56 FASTATTN_R52, FASTATTN_R(52)
#define FASTATTN_R60 FASTATTN_R56, FASTATTN_R(56)
#define FASTATTN_R64 FASTATTN_R60, FASTATTN_R(60)
#define FASTATTN_R68 FASTATTN_R64, FASTATTN_R(64)
#define FASTATTN_R72 FASTATTN_R68, FASTATTN_R(68)
#define FASTATTN_R76 FASTATTN_R72, FASTATTN_R(72)
#define FASTATTN_R80 FASTATTN_R76, FASTATTN_R(76)
#define FASTATTN_R84 FASTATTN_R80, FASTATTN_R(80)
#define FASTATTN_R88 FASTATTN_R84, FASTATTN_R(84)
#define FASTATTN_R92 FASTATTN_R88, FASTATTN_R(88)
#define FASTATTN_R96 FASTATTN_R92, FASTATTN_R(92)
#define FASTATTN_R100 FASTATTN_R96, FASTATTN_R(96)
#define FASTATTN_R104 FASTATTN_R100, FASTATTN_R(100)
#define FASTATTN_R108 FASTATTN_R104, FASTATTN_R(104)
#define FASTATTN_R112 FASTATTN_R108, FASTATTN_R(108)
#define FASTATTN_R116 FASTATTN_R112, FASTATTN_R(112)
#define FASTATTN_R120 FASTATTN_R116, FASTATTN_R(116)
#define FASTATTN_R124 FASTATTN_R120, FASTATTN_R(120)
#define FASTATTN_R128 FASTATTN_R124, FASTATTN_R(124)

// p0 .. p6 are the numbers of the operands behind the accumulators; p0 is also the number of accumulators.
#define FASTATTN_WGMMA_OF(TYPE, NAME, N, p0, p1, p2, p3, p4, p5, p6)                                             \
  template <bool transpose_a, bool transpose_b>                                                                  \
  struct Wgmma<TYPE, N, transpose_a, transpose_b> {                                                              \
    FASTATTN_DEVICE static void issue(float (&acc)[N / 2], uint64_t a, uint64_t b, int accumulate) {             \
      asm volatile(                                                                                              \
          "{\n"                                                                                                  \
          ".reg .pred p;\n"                                                                                      \
          "setp.ne.b32 p, %" #p2                                                                                 \
          ", 0;\n"                                                                                               \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" FASTATTN_D##p0                    \
          "}, %" #p0 ", %" #p1 ", p, 1, 1, %" #p3 ", %" #p4                                                      \
          ";\n"                                                                                                  \
          "}\n"                                                                                                  \
          : FASTATTN_R##p0                                                                                       \
          : "l"(a), "l"(b), "r"(accumulate), "n"(int(transpose_a)), "n"(int(transpose_b)));                      \
    }                                                                                                            \
    FASTATTN_DEVICE static void issue(float (&acc)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) { \
      asm volatile(                                                                                              \
          "{\n"                                                                                                  \
          ".reg .pred p;\n"                                                                                      \
          "setp.ne.b32 p, %" #p5                                                                                 \
          ", 0;\n"                                                                                               \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" FASTATTN_D##p0                    \
          "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 ", p, 1, 1, %" #p6                                \
          ";\n"                                                                                                  \
          "}\n"                                                                                                  \
          : FASTATTN_R##p0                                                                                       \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int(transpose_b)));         \
    }                                                                                                            \
  };

#define FASTATTN_WGMMA(N, ...)                     \
  FASTATTN_WGMMA_OF(half_t, "f16", N, __VA_ARGS__) \
  FASTATTN_WGMMA_OF(bfloat16_t, "bf16", N, __VA_ARGS__)

FASTATTN_WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
FASTATTN_WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
FASTATTN_WGMMA(24, 12, 13, 14, 15, 16, 17, 18)
FASTATTN_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
FASTATTN_WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
FASTATTN_WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
FASTATTN_WGMMA(56, 28, 29, 30, 31, 32, 33, 34)
FASTATTN_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
FASTATTN_WGMMA(72, 36, 37, 38, 39, 40, 41, 42)
FASTATTN_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
FASTATTN_WGMMA(88, 44, 45, 46, 47, 48, 49, 50)
FASTATTN_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
FASTATTN_WGMMA(104, 52, 53, 54, 55, 56, 57, 58)
FASTATTN_WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
FASTATTN_WGMMA(120, 60, 61, 62, 63, 64, 65, 66)
FASTATTN_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
FASTATTN_WGMMA(136, 68, 69, 70, 71, 72, 73, 74)
FASTATTN_WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
FASTATTN_WGMMA(152, 76, 77, 78, 79, 80, 81, 82)
FASTATTN_WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
FASTATTN_WGMMA(168, 84, 85, 86, 87, 88, 89, 90)
FASTATTN_WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
FASTATTN_WGMMA(184, 92, 93, 94, 95, 96, 97, 98)
FASTATTN_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
FASTATTN_WGMMA(200, 100, 101, 102, 103, 104, 105, 106)
FASTATTN_WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
FASTATTN_WGMMA(216, 108, 109, 110, 111, 112, 113, 114)
FASTATTN_WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
FASTATTN_WGMMA(232, 116, 117, 118, 119, 120, 121, 122)
FASTATTN_WGMMA(240, 120, 121, 122, 123, 124, 125, 126)
FASTATTN_WGMMA(248, 124, 125, 126, 127, 128, 129, 130)
FASTATTN_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

#undef FASTATTN_WGMMA
#undef FASTATTN_WGMMA_OF
#undef FASTATTN_R
#undef FASTATTN_D4
#undef FASTATTN_R4
#undef FASTATTN_D8
#undef FASTATTN_R8
#undef FASTATTN_D12
#undef FASTATTN_R12
#undef FASTATTN_D16
#undef FASTATTN_R16
#undef FASTATTN_D20
#undef FASTATTN_R20
#undef FASTATTN_D24
#undef FASTATTN_R24
#undef FASTATTN_D28
#undef FASTATTN_R28
#undef FASTATTN_D32
#undef FASTATTN_R32
#undef FASTATTN_D36
#undef FASTATTN_R36
#undef FASTATTN_D40
#undef FASTATTN_R40
#undef FASTATTN_D44
#undef FASTATTN_R44
#undef FASTATTN_D48
#undef FASTATTN_R48
#undef FASTATTN_D52
#undef FASTATTN_R52
#undef FASTATTN_D56
#undef FASTATTN_R56
#undef FASTATTN_D60
#undef FASTATTN_R60
#undef FASTATTN_D64
#undef FASTATTN_R64
#undef FASTATTN_D68
#undef FASTATTN_R68
#undef FASTATTN_D72
#undef FASTATTN_R72
#undef FASTATTN_D76
#undef FASTATTN_R76
#undef FASTATTN_D80
#undef FASTATTN_R80
#undef FASTATTN_D84
#undef FASTATTN_R84
#undef FASTATTN_D88
#undef FASTATTN_R88
#undef FASTATTN_D92
#undef FASTATTN_R92
#undef FASTATTN_D96
#undef FASTATTN_R96
#undef FASTATTN_D100
#undef FASTATTN_R100
#undef FASTATTN_D104
#undef FASTATTN_R104
#undef FASTATTN_D108
#undef FASTATTN_R108
#undef FASTATTN_D112
#undef FASTATTN_R112
#undef FASTATTN_D116
#undef FASTATTN_R116
#undef FASTATTN_D120
#undef FASTATTN_R120
#undef FASTATTN_D124
#undef FASTATTN_R124
#undef FASTATTN_D128
#undef FASTATTN_R128

}  // namespace fastattn

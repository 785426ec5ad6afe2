// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter-based generator. The
// draw for (seed, offset, token) is a pure function of these three, on every backend and for any number of threads.
#pragma once

#include "core/number.h"

namespace memdec {
namespace {

struct Random4 {
  uint32_t word[4];
};

MEMDEC_HD inline Random4 philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  uint32_t c0 = static_cast<uint32_t>(counter_low), c1 = static_cast<uint32_t>(counter_low >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_high), c3 = static_cast<uint32_t>(counter_high >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    c0 = next0;
    c2 = next2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Random4{{c0, c1, c2, c3}};
}

// A draw of 32 bits as a uniform in the open interval (0, 1): (k + ½)·2⁻³², never exactly 0 or 1 (in float64; see gumbel).
MEMDEC_HD inline double uniform(uint32_t draw) { return (static_cast<double>(draw) + 0.5) * 0x1p-32; }

}  // namespace
}  // namespace memdec

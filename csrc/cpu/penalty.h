// What the text so far does to a logit.
#pragma once

#include "core/error.h"
#include "core/view.h"

namespace deltaic {
namespace DELTAIC_ISA {

struct Penalties {
    double presence, frequency, repetition;

    DELTAIC_INLINE void check(const char* op) const {
        if (!(repetition > 0.0) || repetition - repetition != 0.0)
            fail(op, "repetition_penalty must be a finite number > 0");
        if (presence - presence != 0.0 || frequency - frequency != 0.0) fail(op, "penalties must be finite");
    }
    // Whether no logit becomes larger.
    DELTAIC_INLINE bool only_lower() const { return presence >= 0.0 && frequency >= 0.0 && repetition >= 1.0; }
    // The logit of an id of the text, which was generated so many times.
    DELTAIC_INLINE double apply(double value, int64_t times) const {
        value = value > 0.0 ? value / repetition : value * repetition;
        return times > 0 ? value - (frequency * static_cast<double>(times) + presence) : value;
    }
};

// The ids of one text before a row of logits: those of `seen` (see python/deltaic/ops/layout.py), and `count` drafts.
struct TextIds {
    const int64_t *held = nullptr, *generated = nullptr, *drafts = nullptr;
    int64_t count = 0;

    DELTAIC_INLINE bool is_held(int64_t id) const { return (static_cast<uint64_t>(held[id / 64]) >> id % 64 & 1) != 0; }
    DELTAIC_INLINE int64_t drafted(int64_t id) const {
        int64_t times = 0;
        for (int64_t j = 0; j < count; ++j) times += drafts[j] == id;
        return times;
    }
};

// The texts of several sequences, as operators get them: see sample_rows in python/deltaic/ops/reference.py.
class Texts {
  public:
    Texts(const char* op, Views seen, const View& cu_seqlens, const View& fed, int64_t rows, int64_t limit)
        : seen_(seen), cu_(cu_seqlens.i64()), fed_(fed.i64()), skipped_(fed.shape[0] - rows) {
        if (!any()) return;
        if (skipped_ < 0) fail(op, "fed must have at least as many ids as logits have rows");
        if (seen[0].shape[1] * 64 < limit) fail(op, "seen must have room for `limit` ids");
        bool rising = cu_seqlens.shape[0] == seen.size + 1 && cu_[0] == 0 && cu_[seen.size] == fed.shape[0];
        for (int64_t b = 0; rising && b < seen.size; ++b) rising = cu_[b] <= cu_[b + 1];
        if (!rising) fail(op, "cu_seqlens must rise from 0 to the size of fed, with one sequence for each of seen");
    }

    DELTAIC_INLINE bool any() const { return seen_.size > 0; }
    // Of row t of the logits; where there are any.
    DELTAIC_INLINE TextIds before(int64_t t) const {
        int64_t b = 0;
        while (cu_[b + 1] <= skipped_ + t) ++b;
        const int64_t* const held = seen_[b].i64();
        return {held, held + seen_[b].shape[1], fed_ + cu_[b] + 1, skipped_ + t - cu_[b]};
    }

  private:
    Views seen_;
    const int64_t *cu_, *fed_;
    int64_t skipped_;
};

}  // namespace DELTAIC_ISA
}  // namespace deltaic

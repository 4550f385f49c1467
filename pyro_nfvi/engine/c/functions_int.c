/* Functions of integers. A division by zero, at which torch raises, must not end the process. */
static inline REAL abs_SUF(REAL x) { return x < 0 ? -x : x; }
static inline REAL sign_SUF(REAL x) { return (x > 0) - (x < 0); }
static inline REAL sgn_SUF(REAL x) { return (x > 0) - (x < 0); }
static inline REAL relu_SUF(REAL x) { return x < 0 ? 0 : x; }
static inline REAL maximum_SUF(REAL x, REAL y) { return x > y ? x : y; }
static inline REAL minimum_SUF(REAL x, REAL y) { return x < y ? x : y; }
static inline REAL clamp_low_SUF(REAL x, REAL low) { return x < low ? low : x; }
static inline REAL clamp_high_SUF(REAL x, REAL high) { return x > high ? high : x; }
static inline REAL remainder_SUF(REAL x, REAL y)
  { if (y == 0) return 0; REAL r = x % y; return (r != 0 && ((y < 0) != (r < 0))) ? r + y : r; }
static inline REAL fmod_SUF(REAL x, REAL y) { return y == 0 ? 0 : x % y; }
static inline REAL floor_divide_SUF(REAL x, REAL y)
  { if (y == 0) return 0; REAL d = x / y; return (x % y != 0 && ((x < 0) != (y < 0))) ? d - 1 : d; }
static inline REAL pow_SUF(REAL x, REAL y)
  { REAL p = 1; for (; y > 0; y >>= 1, x *= x) if (y & 1) p *= x; return p; }
static inline _Bool isinf_SUF(REAL x) { return 0; }
static inline REAL trunc_divide_SUF(REAL x, REAL y) { return y == 0 ? 0 : x / y; }

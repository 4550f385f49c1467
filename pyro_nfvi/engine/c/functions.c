/* Elementary functions without branches or tables, which compilers turn into vector code.

   REAL is the type, SUF its suffix, LIBM the suffix of the C library, BITS the integer of the same
   size. Each is accurate to a few units in the last place, for nan, infinities, denormals too. */

static inline REAL abs_SUF(REAL x) { return fabsLIBM(x); }
static inline REAL ceil_SUF(REAL x) { return ceilLIBM(x); }
static inline REAL floor_SUF(REAL x) { return floorLIBM(x); }
static inline REAL round_SUF(REAL x) { return rintLIBM(x); }
static inline REAL trunc_SUF(REAL x) { return truncLIBM(x); }
static inline REAL sqrt_SUF(REAL x) { return sqrtLIBM(x); }
static inline REAL reciprocal_SUF(REAL x) { return 1 / x; }
static inline REAL rsqrt_SUF(REAL x) { return 1 / sqrtLIBM(x); }
static inline REAL relu_SUF(REAL x) { return x < 0 ? 0 : x; }
static inline REAL sign_SUF(REAL x) { return (REAL)((x > 0) - (x < 0)); }
static inline REAL sgn_SUF(REAL x) { return sign_SUF(x); }
static inline _Bool isinf_SUF(REAL x) { return fabsLIBM(x) == INFINITY; }
static inline REAL maximum_SUF(REAL x, REAL y) { return (x > y || x != x) ? x : y; }
static inline REAL minimum_SUF(REAL x, REAL y) { return (x < y || x != x) ? x : y; }
static inline REAL clamp_low_SUF(REAL x, REAL low) { return (x < low || low != low) ? low : x; }
static inline REAL clamp_high_SUF(REAL x, REAL high) { return (x > high || high != high) ? high : x; }
static inline REAL lerp_SUF(REAL x, REAL y, REAL w)
  { return fabsLIBM(w) < (REAL)0.5 ? x + w * (y - x) : y - (y - x) * (1 - w); }

static inline REAL bits_to_SUF(BITS b) { REAL x; __builtin_memcpy(&x, &b, sizeof x); return x; }
static inline BITS bits_of_SUF(REAL x) { BITS b; __builtin_memcpy(&b, &x, sizeof b); return b; }

/* 2^n for a whole number n between the exponents of the smallest and the largest normal. */
static inline REAL power_of_two_SUF(REAL n)
  { return bits_to_SUF((bits_of_SUF(n + ROUNDER) << MANTISSA) + bits_of_SUF((REAL)1)); }

/* x = n log 2 + r with |r| < 0.35. */
static inline REAL nearest_SUF(REAL x) { return (x + ROUNDER) - ROUNDER; }
static inline REAL reduced_SUF(REAL x, REAL n) { return (x - n * LN2_HI) - n * LN2_LO; }

static inline REAL exp_SUF(REAL x) {
  x = x > EXP_MAX ? EXP_MAX : x; x = x < EXP_MIN ? EXP_MIN : x;
  REAL n = nearest_SUF(x * LOG2_E), r = reduced_SUF(x, n), half = nearest_SUF((REAL)0.5 * n);
  return ((r * r) * EXP_TAIL(r) + r + 1) * power_of_two_SUF(half) * power_of_two_SUF(n - half);
}

static inline REAL expm1_SUF(REAL x) {
  REAL y = x > EXP_MAX ? EXP_MAX : x; y = y < EXPM1_MIN ? EXPM1_MIN : y;
  REAL n = nearest_SUF(y * LOG2_E), r = reduced_SUF(y, n), s = power_of_two_SUF(n - 1);
  REAL value = 2 * (s * ((r * r) * EXP_TAIL(r) + r) + (s - (REAL)0.5));
  return fabsLIBM(x) < TINY ? x : value;
}

/* log x = e log 2 + log m with m between sqrt(1/2) and sqrt(2): fdlibm's series in s = f / (2 + f). */
static inline REAL log_SUF(REAL x) {
  _Bool small = x < SMALLEST_NORMAL;
  REAL y = small ? x * TWO_TO_MANTISSA : x;
  BITS b = bits_of_SUF(y) + (bits_of_SUF((REAL)1) - bits_of_SUF((REAL)0.70710678118654752));
  REAL e = EXPONENT(b) - (small ? (REAL)MANTISSA : 0);
  REAL f = bits_to_SUF((b & MANTISSA_MASK) + bits_of_SUF((REAL)0.70710678118654752)) - 1;
  REAL s = f / (2 + f), z = s * s, h = (REAL)0.5 * f * f;
  REAL value = e * LN2_HI - ((h - (s * (h + LOG_TAIL(z)) + e * LN2_LO)) - f);
  value = x == INFINITY ? x : value;
  value = x == 0 ? -INFINITY : value;
  return (x < 0 || x != x) ? NAN : value;
}

static inline REAL log1p_SUF(REAL x) {
  REAL u = 1 + x, rest = u < 2 ? x - (u - 1) : 1 - (u - x);
  REAL value = log_SUF(u) + (u > 0 && u < INFINITY ? rest / u : 0);
  return fabsLIBM(x) < TINY ? x : value;
}

static inline REAL tanh_SUF(REAL x) {
  REAL a = fabsLIBM(x), e = expm1_SUF(a > TANH_MAX ? 2 * TANH_MAX : 2 * a), t = e / (e + 2);
  return x != x ? x : copysignLIBM(t, x);
}

static inline REAL sigmoid_SUF(REAL x) {
  REAL e = exp_SUF(-fabsLIBM(x));
  return (x >= 0 || x != x ? 1 : e) / (1 + e);
}

static inline REAL softplus_SUF(REAL x, REAL beta, REAL threshold) {
  REAL y = x * beta;
  return y > threshold ? x : ((y > 0 ? y : 0) + log1p_SUF(exp_SUF(-fabsLIBM(y)))) / beta;
}

static inline REAL softplus_slope_SUF(REAL x, REAL beta, REAL threshold)
  { return x * beta > threshold ? 1 : sigmoid_SUF(x * beta); }

static inline REAL exp2_SUF(REAL x) { return exp2LIBM(x); }
static inline REAL log2_SUF(REAL x) { return log2LIBM(x); }
static inline REAL log10_SUF(REAL x) { return log10LIBM(x); }
static inline REAL sin_SUF(REAL x) { return sinLIBM(x); }
static inline REAL cos_SUF(REAL x) { return cosLIBM(x); }
static inline REAL tan_SUF(REAL x) { return tanLIBM(x); }
static inline REAL asin_SUF(REAL x) { return asinLIBM(x); }
static inline REAL acos_SUF(REAL x) { return acosLIBM(x); }
static inline REAL atan_SUF(REAL x) { return atanLIBM(x); }
static inline REAL sinh_SUF(REAL x) { return sinhLIBM(x); }
static inline REAL cosh_SUF(REAL x) { return coshLIBM(x); }
static inline REAL asinh_SUF(REAL x) { return asinhLIBM(x); }
static inline REAL acosh_SUF(REAL x) { return acoshLIBM(x); }
static inline REAL atanh_SUF(REAL x) { return atanhLIBM(x); }
static inline REAL erf_SUF(REAL x) { return erfLIBM(x); }
static inline REAL erfc_SUF(REAL x) { return erfcLIBM(x); }
static inline REAL lgamma_SUF(REAL x) { return lgammaLIBM(x); }
static inline REAL copysign_SUF(REAL x, REAL y) { return copysignLIBM(x, y); }
static inline REAL hypot_SUF(REAL x, REAL y) { return hypotLIBM(x, y); }
static inline REAL atan2_SUF(REAL x, REAL y) { return atan2LIBM(x, y); }
static inline REAL pow_SUF(REAL x, REAL y) { return powLIBM(x, y); }
static inline REAL fmod_SUF(REAL x, REAL y) { return fmodLIBM(x, y); }
static inline REAL remainder_SUF(REAL x, REAL y)
  { REAL r = fmodLIBM(x, y); return (r != 0 && ((y < 0) != (r < 0))) ? r + y : r; }
static inline REAL floor_divide_SUF(REAL x, REAL y) {
  if (y == 0) return x / y;
  REAL r = fmodLIBM(x, y), d = (x - r) / y;
  if (r != 0 && ((y < 0) != (r < 0))) d -= 1;
  if (d == 0) return copysignLIBM(0, x / y);
  REAL f = floorLIBM(d);
  return d - f > (REAL)0.5 ? f + 1 : f;
}

/* Digamma by its recurrence up to 10, then its asymptotic series; reflected below zero. */
static inline REAL digamma_SUF(REAL value) {
  double x = value, shift = 0;
  if (x == 0) return copysignLIBM(INFINITY, -value);
  if (x < 0) {
    if (x == floor(x)) return NAN;
    double part = x - rint(x);
    shift = -3.14159265358979323846 / tan(3.14159265358979323846 * part);
    x = 1 - x;
  }
  while (x < 10) { shift -= 1 / x; x += 1; }
  double z = 1 / (x * x), series = z * (1. / 12 - z * (1. / 120 - z * (1. / 252 - z * (1. / 240
    - z * (1. / 132 - z * (691. / 32760 - z / 12))))));
  return (REAL)(shift + log(x) - 0.5 / x - (x < 1e17 ? series : 0));
}

/* Hurwitz zeta sum_k (k + q)^-s: some terms, then Euler and Maclaurin's formula. */
static inline double zeta_SUF(double s, double q) {
  static const double factors[12] = {12, -720, 30240, -1209600, 47900160, -1.8924375803183791606e9,
    7.47242496e10, -2.950130727918164224e12, 1.1646782814350067249e14, -4.5979787224074726105e15,
    1.8152105401943546773e17, -7.1661652561756670113e18};
  if (q <= 0 && q == floor(q)) return INFINITY;
  double sum = pow(q, -s), power = sum;
  while (q < 9 + s) {
    q += 1;
    power = pow(q, -s);
    sum += power;
  }
  sum += power * q / (s - 1) - 0.5 * power;
  double factor = 1;
  for (int k = 0; k < 12; k++) {
    factor *= s + 2 * k; power /= q;
    sum += factor * power / factors[k];
    factor *= s + 2 * k + 1; power /= q;
  }
  return sum;
}

static inline REAL polygamma_SUF(REAL x, int order) {
  if (order == 0) return digamma_SUF(x);
  if (x != x || x == INFINITY) return 1 / x;
  if (order == 1 && x < (REAL)0.5) {
    double s = sin(3.14159265358979323846 * (x - rint(x)));
    if (s == 0) return INFINITY;
    return (REAL)(9.86960440108935861883 / (s * s) - zeta_SUF(2, 1 - (double)x));
  }
  return (REAL)((order % 2 ? 1 : -1) * tgamma(order + 1.) * zeta_SUF(order + 1, x));
}

/* exp(x^2) erfc(x) for x >= 0; the rounding error of x^2 is made good. */
static inline double scaled_erfc_SUF(double x) {
  double h = x * x, z = 0.5 / h, tail = 1;
  if (x < 25) return exp(h) * (1 + fma(x, x, -h)) * erfc(x);
  for (int k = 13; k > 0; k -= 2) tail = 1 - k * z * tail;
  return 0.56418958354775628695 / x * tail;
}

static inline REAL special_erfcx_SUF(REAL value) {
  double x = value, e = exp(x * x);
  if (!(x < 0)) return x != x ? value : (REAL)scaled_erfc_SUF(x);
  return (REAL)(2 * (e < INFINITY ? e + e * fma(x, x, -x * x) : e) - scaled_erfc_SUF(-x));
}

/* Giles's start for small and for large arguments, then Newton's steps. */
static inline double erfcinv_start_SUF(double q) {
  double z = sqrt(-log(q / 2));
  return (((1.641345311 * z + 3.429567803) * z - 1.624906493) * z - 1.970840454)
    / ((1.637067800 * z + 3.543889200) * z + 1);
}

static inline REAL erfinv_SUF(REAL value) {
  double y = value, a = fabs(y), z = y * y;
  if (!(a < 1)) return a == 1 ? copysignLIBM(INFINITY, value) : NAN;
  double x = a > 0.7 ? erfcinv_start_SUF(1 - a) : a
    * (((-0.140543331 * z + 0.914624893) * z - 1.645349621) * z + 0.886226899)
    / ((((0.012229801 * z - 0.329097515) * z + 1.442710462) * z - 2.118377725) * z + 1);
  for (int k = 0; k < 3; k++) {
    double off = a > 0.7 ? (1 - a) - erfc(x) : erf(x) - a;
    x -= off / (1.12837916709551257390 * exp(-x * x));
  }
  return copysignLIBM((REAL)x, value);
}

/* Standard normal quantile: in the tails log erfc(t) = log(2p), solved by Newton's steps. */
static inline REAL special_ndtri_SUF(REAL value) {
  double p = value < (REAL)0.5 ? value : 1 - (double)value;
  if (!(p > 0)) return p == 0 ? (value > 0 ? INFINITY : -INFINITY) : NAN;
  double t;
  if (p > 0.25) {
    double y = 1 - 2 * p, z = y * y;
    t = y * (((-0.140543331 * z + 0.914624893) * z - 1.645349621) * z + 0.886226899)
      / ((((0.012229801 * z - 0.329097515) * z + 1.442710462) * z - 2.118377725) * z + 1);
    for (int k = 0; k < 2; k++) t -= (erf(t) - y) / (1.12837916709551257390 * exp(-t * t));
  } else {
    t = erfcinv_start_SUF(2 * p);
    for (int k = 0; k < 3; k++) {
      double scaled = scaled_erfc_SUF(t);
      t += (log(scaled) - t * t - log(2 * p)) * scaled / 1.12837916709551257390;
    }
  }
  t *= 1.41421356237309504880;
  return (REAL)(value < (REAL)0.5 ? -t : t);
}

/* Modified Bessel functions of the first kind times exp(-|x|): Taylor's series, or Hankel's. */
static inline double bessel_SUF(double x, int order) {
  double a = fabs(x), term = 1, sum = 1;
  if (a < 30) {
    for (int k = 1; term > 1e-17 * sum; k++) {
      term *= a * a / 4 / k / (k + order);
      sum += term;
    }
    sum *= exp(-a) * (order ? a / 2 : 1);
  } else {
    for (int k = 1; k < 25; k++) {
      term *= ((2 * k - 1.) * (2 * k - 1) - 4 * order) / (8 * k * a);
      sum += term;
    }
    sum /= 2.50662827463100050242 * sqrt(a);
  }
  return order ? copysign(sum, x) : sum;
}
static inline double bessel_unscaled_SUF(double x, int order) {
  double half = exp(fabs(x) / 2);
  return half < INFINITY ? bessel_SUF(x, order) * half * half : order ? copysign(half, x) : half;
}
static inline REAL i0_SUF(REAL x) { return (REAL)bessel_unscaled_SUF(x, 0); }
static inline REAL special_i1_SUF(REAL x) { return (REAL)bessel_unscaled_SUF(x, 1); }
static inline REAL special_i0e_SUF(REAL x) { return (REAL)bessel_SUF(x, 0); }
static inline REAL special_i1e_SUF(REAL x) { return (REAL)bessel_SUF(x, 1); }
